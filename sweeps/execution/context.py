"""What all trials of a sweep share."""

from dataclasses import dataclass
from pathlib import Path

from analysis.constraint import REROUTE_TOLERANCE
from cbtrain.config import CircuitBreakerConfig
from sweeps.runtime.interruption import StopFile
from sweeps.runtime.placement import Workers


@dataclass(frozen=True)
class TrialContext:
    """Of one sweep."""

    config: CircuitBreakerConfig
    run_dir: Path
    workers: Workers
    teacher_cache: Path | None = None
    """Where the frozen teacher's states are; None runs it at every step."""
    reroute_tolerance: float = REROUTE_TOLERANCE
    """The sweep's limit; a trial whose reroute loss still falls by more has not converged."""
    profile: bool = False
    """Whether each trial writes where its time went."""
    trial_timeout: float = 0.0
    """Seconds without progress after which an attempt is ended; 0 for none."""
    session: int = 0
    """How often the sweep was resumed. Ray's files of each session lie apart: it would restore what it finds."""

    @property
    def ray_directory(self) -> Path:
        """Where Ray keeps its own files."""
        return self.run_dir / "ray" / f"session-{self.session}"

    @property
    def stop_file(self) -> StopFile:
        """What asks this session's trials to stop."""
        return StopFile(self.ray_directory / "stop")
