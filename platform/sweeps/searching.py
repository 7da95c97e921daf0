"""Search by Optuna, asked and told in rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.platform.errors import UserError
from lamina.platform.sweeps.space import Domain


def ask(
    domains: Sequence[Domain],
    told: Sequence[tuple[Mapping[str, Any], float | None]],
    count: int,
    seed: int,
    mode: str,
) -> list[dict[str, Any]]:
    """Returns the next points, from Optuna's tree-structured Parzen estimator.

    The study is made anew from what it was told, with a seed of its own for each round, so that a
    search that was stopped asks for the same points when it goes on.

    Args:
        domains: the space.
        told: values and score of all trials so far, in order; None: the trial diverged.
        count: how many points.
        seed: of the search.
        mode: "max" or "min".

    Raises:
        UserError: Optuna isn't installed.

    References:
        Akiba et al., Optuna, https://arxiv.org/abs/1907.10902; Bergstra et al., Algorithms for
        Hyper-Parameter Optimization, NeurIPS 2011
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "sweep.method = 'optuna' needs Optuna: pip install 'lamina[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {domain.key: _distribution(domain) for domain in domains}
    study = optuna.create_study(
        direction="maximize" if mode == "max" else "minimize",
        # A constant guess for those asked but not told keeps a round's points apart.
        sampler=optuna.samplers.TPESampler(
            seed=(seed + 7919 * len(told)) % 2**32, constant_liar=True, multivariate=False
        ),
    )
    states = optuna.trial.TrialState
    for values, score in told:
        params = {d.key: _encoded(d, values[d.key]) for d in domains}
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=distributions,
                value=score,
                state=states.FAIL if score is None else states.COMPLETE,
            )
        )
    asked = [study.ask(distributions) for _ in range(count)]
    return [{d.key: _decoded(d, one.params[d.key]) for d in domains} for one in asked]


def _distribution(domain: Domain) -> Any:
    from optuna import distributions

    if domain.values:  # by place: Optuna's choices are no tuples
        return distributions.CategoricalDistribution(tuple(range(len(domain.values))))
    log = domain.scale == "log"
    if domain.whole:
        return distributions.IntDistribution(int(domain.low), int(domain.high), log=log)
    return distributions.FloatDistribution(float(domain.low), float(domain.high), log=log)


def _encoded(domain: Domain, value: Any) -> Any:
    if not domain.values:
        return value
    plain = lambda v: tuple(map(plain, v)) if isinstance(v, list | tuple) else v
    return [plain(v) for v in domain.values].index(plain(value))


def _decoded(domain: Domain, value: Any) -> Any:
    if domain.values:
        return domain.values[value]
    if domain.whole:
        return value
    return min(max(float(f"{value:.6g}"), domain.low), domain.high)
