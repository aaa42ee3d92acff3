"""The budgets of the loss's kernel with a GPU's exponentials, logarithms and divisions."""

import pytest
from policy_loss_cases import assert_matches_reference, config_id, every_config, random_inputs

pytestmark = pytest.mark.usefixtures("gpu_arithmetic")


@pytest.mark.parametrize("config", every_config()[::5], ids=config_id)
def test_policy_loss(config):
    num_items = 9.0 if config.divides_by_num_items else None
    assert_matches_reference(random_inputs([7, 4], 7), config, "cpu", num_items_in_batch=num_items)
