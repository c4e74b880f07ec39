"""What verl imports as it starts: its import registers rlcore's losses and advantages.

verl reports a plugin that fails at debug level alone, so the reason is logged here as well.
"""

from __future__ import annotations

import logging

from rlcore.integrations.verl import register

try:
    register()
except Exception as error:
    logging.getLogger(__name__).warning("rlcore is not registered with verl: %s", error)
    raise
