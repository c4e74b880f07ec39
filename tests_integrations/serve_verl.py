"""A pytest plugin: what verl's own tests import from core_algos is rlcore's."""

import verl.trainer.ppo.core_algos as core

from rlcore.integrations import verl as rl_verl
from rlcore.integrations.verl.advantages import ESTIMATORS, gae
from rlcore.integrations.verl.losses import make_policy_loss

rl_verl.register()
core.compute_gae_advantage_return = gae
core.compute_grpo_outcome_advantage = ESTIMATORS["rlcore_grpo"]
core.compute_rloo_outcome_advantage = ESTIMATORS["rlcore_rloo"]
core.compute_reinforce_plus_plus_outcome_advantage = ESTIMATORS["rlcore_reinforce_plus_plus"]
core.compute_policy_loss_vanilla = make_policy_loss("rlcore_ppo")
