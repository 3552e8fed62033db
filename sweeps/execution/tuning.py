"""A sweep's run on Ray Tune: each attempt at a trial is one of Tune's, and the searcher says which and when it ends."""

import itertools

from ray import tune
from ray.tune.experiment import Trial

from cbtrain.config import cli
from sweeps.execution.context import TrialContext
from sweeps.execution.searcher import PlanSearcher
from sweeps.execution.trial import run_trial
from sweeps.runtime.failures import kind_of, root_cause
from sweeps.runtime.placement import TUNE_RESOURCES
from sweeps.runtime.processes import Processes


def run_trials(searcher: PlanSearcher, context: TrialContext, processes: Processes | None, concurrency: int) -> None:
    """Run what the searcher gives until it gives no more; what went wrong in it is in `searcher.failure`.

    Where Tune ends in the midst, since Ray's memory monitor has killed a process of Tune's own (which Tune knows no
    answer to), another takes its place, and the trials that ran go on from their checkpoints.

    Raises:
        Exception: Tune ended again before a trial had.
    """
    ended = -1
    for attempt in itertools.count():
        try:
            _tuner(searcher, context, processes, concurrency, attempt).fit()
        except Exception as error:
            now = searcher.plan.ended
            if kind_of(error) not in ("out_of_memory", "lost") or now == ended:
                raise
            ended = now
            searcher.begin_again(root_cause(error))
        else:
            return


def _tuner(
    searcher: PlanSearcher, context: TrialContext, processes: Processes | None, concurrency: int, attempt: int
) -> tune.Tuner:
    trainable = tune.with_parameters(run_trial, context=context, processes=processes.handles if processes else [])
    return tune.Tuner(
        tune.with_resources(trainable, TUNE_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,  # an attempt is a trial to Tune; the searcher says when all have ended
            max_concurrent_trials=concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{attempt}", storage_path=str(context.ray_directory), verbose=0, callbacks=[_OurOwn()]
        ),
    )


class _OurOwn(tune.Callback):
    """What Tune does of its own accord and a sweep has no use for."""

    def setup(self, **_info: object) -> None:
        """Take back SIGUSR1, at which Tune would end its run in a way of its own."""
        cli.catch_signals()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """As `on_trial_complete`."""
        self.on_trial_complete(iteration, trials, trial, **info)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_info: object) -> None:
        """Forget the extremes and means that Tune keeps of every metric: a quarter of a MiB a trial, to no end."""
        kept = trial.run_metadata
        kept.metric_analysis.clear()
        kept.metric_n_steps.clear()
        kept.invalidate_cache()
