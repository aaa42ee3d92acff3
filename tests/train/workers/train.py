"""`vgpo_train/main.py` with the tests' parts registered."""

import sys

import parts  # noqa: F401

from vgpo_train.main import main

sys.exit(main())
