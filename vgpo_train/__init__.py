"""GRPO and VGPO under DeepSpeed ZeRO-3: `deepspeed vgpo_train/main.py --config FILE [key=value ...]`.

`config` describes a run, `preflight` checks it, `trainer` runs its steps. `data` reads rows into prompts, `model` loads
and exports checkpoints, `rl` holds the phases of a step, `rewards` what completions earn, `run` what a run writes and
resumes from, `quickstart` the data set and the checkpoint of `make train`. Public are the command line, the keys of
`TrainConfig`, `vgpo_train.model`, `vgpo_train.rewards`, and `register` of `rl.algorithms` and `rl.rollout`.
"""
