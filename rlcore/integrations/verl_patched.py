"""Its import patches verl: for actor_rollout_ref.model.external_lib, which the workers import."""

from __future__ import annotations

from rlcore.integrations.verl import patch

patch()
