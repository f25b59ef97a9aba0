"""What the executor does by itself: it drives executions towards what was committed, watches the nodes, and sweeps.

Every loop records first and acts after, and every act can be repeated: a crash anywhere costs a repetition.
"""

from services.executor.loops.driver import Driver
from services.executor.loops.scaler import Scaler
from services.executor.loops.sweeper import Sweeper
from services.executor.loops.watcher import Watcher

__all__ = ["Driver", "Scaler", "Sweeper", "Watcher"]
