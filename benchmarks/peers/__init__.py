"""What the tasks are measured against: each is checked equal to ours before it is timed, unless it does less."""
