"""The phases of a step: rollout, scoring, weights (advantages, algorithms), update; `types` holds what passes between.

Public: `algorithms.register` and `rollout.register`, with the types that what they register takes and returns.
"""
