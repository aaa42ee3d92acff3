"""What tests share with the benchmarks: the state of the checkout, the record of a session, faults of a GPU."""
