"""Around the steps of a run: ranks, checkpoints, metrics, report; public: `python -m vgpo_train.run.report`."""
