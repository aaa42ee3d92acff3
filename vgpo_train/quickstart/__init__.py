"""The data set and the checkpoint of `make train`: `python -m vgpo_train.quickstart.{pictures,tiny_model} DIR`."""
