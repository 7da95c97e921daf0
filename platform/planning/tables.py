"""The tables of `lamina compile` and `lamina plan`."""

from collections.abc import Sequence

from lamina.platform.planning.analysis import Analysis, traffic
from lamina.platform.planning.search import AXES, Tried
from lamina.platform.reporting.tables import Table
from lamina.sharding.pods.chips import GIB
from lamina.sharding.pods.roofline import KERNEL_EFFICIENCY


def gib(count: float) -> str:
    """Returns bytes in GiB, or in MiB if they are few."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.2f} MiB"


def milliseconds(seconds: float) -> str:
    """Returns seconds in milliseconds."""
    return f"{seconds * 1e3:,.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e3:.3f} ms"


def mesh(shape: dict[str, int]) -> str:
    """Returns the axes of a mesh that have more than one device."""
    return " ".join(f"{name}={size}" for name, size in shape.items() if size > 1) or "1 device"


def summary(analysis: Analysis) -> str:
    """Returns whether a program fits, in one line."""
    margin = analysis.usable - analysis.needed
    chips = f"{analysis.topology.chips} chips of {analysis.topology.name}"
    if analysis.topology.slices > 1:
        chips += f" in {analysis.topology.slices} slices"
    verdict = (
        f"fits with {gib(margin)} to spare" if analysis.fits else f"DOESN'T FIT, by {gib(-margin)}"
    )
    return (
        f"{chips} ({mesh(analysis.facts.layout.shape)}): {verdict} "
        f"({gib(analysis.needed)} of {gib(analysis.usable)} a device)"
    )


def memory(analysis: Analysis) -> Table:
    """Bytes of one device."""
    facts, told = analysis.facts, analysis.memory
    rows = [
        ("parameters", facts.bytes_of("parameters")),
        ("optimizer state", facts.bytes_of("moments")),
        ("other state", facts.bytes_of("rest")),
        ("batch", facts.batch_bytes),
    ]
    if told is not None:
        rows += [
            ("padding of these", told.arguments - sum(count for _, count in rows)),
            ("results that replace nothing", told.outputs),
            ("activations", told.activations),
            ("temporaries", told.temporary - told.activations),
        ]
        rows += [("code", told.code)] if told.code else []
    return Table(
        ("memory of a device", ">size"),
        [(name, gib(count)) for name, count in rows if count > 0],
        ("total", gib(analysis.needed)),
    )


def collectives(analysis: Analysis) -> Table:
    """The collectives of a step, grouped."""
    rows = [
        (
            row.kind,
            " x ".join(row.axes) or "none",
            str(row.group),
            f"{row.times:,}",
            gib(row.bytes),
            milliseconds(row.seconds),
            "overlapped" if row.overlapped else "blocking",
        )
        for row in traffic(analysis.transfers)
    ]
    columns = ("collective", "mesh axis", ">devices", ">a step", ">size", ">time", "")
    return Table(columns, rows)


def times(analysis: Analysis) -> Table:
    """The roofline of a step."""
    found, done = analysis.estimate, analysis.work
    assert found is not None
    assert done is not None
    tokens = analysis.facts.tokens or analysis.facts.examples
    unit = "tokens" if analysis.facts.tokens else "examples"
    rows = [
        ("products", f"{done.flops:.4e} FLOP", milliseconds(found.compute)),
        ("HBM", gib(done.hbm_bytes), milliseconds(found.memory)),
        ("operations, each at its limit", "", milliseconds(found.operations)),
        ("blocking collectives", "", milliseconds(found.blocking)),
        ("overlapped collectives", "", milliseconds(found.overlapped)),
    ]
    if analysis.topology.slices > 1:
        rows.append(("between slices", "", milliseconds(found.network)))
    for name, seconds in (
        ("step, at best", found.lower),
        ("step, estimated", found.estimate),
        ("step, at worst", found.upper),
    ):
        rate = tokens / seconds / analysis.facts.layout.devices
        told = f"MFU {analysis.mfu(seconds):.1%}, {rate:,.0f} {unit}/s a device"
        rows.append((name, told, milliseconds(seconds)))
    return Table(("time of a step", "", ">time"), rows)


def notes(analysis: Analysis) -> list[str]:
    """Returns what a reader of the figures has to know."""
    found, done = analysis.estimate, analysis.work
    told = []
    if found is not None and done is not None:
        told.append(
            f"Limited by {found.bound}. An estimate from data sheets, not calibrated on a TPU; "
            "rankings are safer than levels."
        )
        if done.kernel_flops:
            told.append(
                f"{done.kernel_flops / done.flops:.0%} of the FLOPs are in Pallas kernels, assumed "
                f"to reach {KERNEL_EFFICIENCY:.0%} of the peak."
            )
    return told


def ranking(tried: Sequence[Tried]) -> Table:
    """The layouts of a plan, best first."""
    rows = []
    for rank, each in enumerate(tried, start=1):
        found, candidate = each.found, each.candidate
        layout = mesh(dict(zip(AXES, candidate.sizes, strict=True)))
        chosen = (layout, candidate.rules, candidate.remat, str(candidate.accumulation))
        if found is None:
            rows.append((str(rank), *chosen, "", "", "", "", each.reason))
        elif found.estimate is None or not found.fits:
            rows.append((str(rank), *chosen, gib(found.needed), "", "", "", "doesn't fit"))
        else:
            best, likely, worst = (
                found.estimate.lower,
                found.estimate.estimate,
                found.estimate.upper,
            )
            rows.append(
                (
                    str(rank),
                    *chosen,
                    gib(found.needed),
                    f"{likely * 1e3:,.0f}",
                    f"{best * 1e3:,.0f} - {worst * 1e3:,.0f}",
                    f"{found.mfu(likely):.1%}",
                    found.estimate.bound,
                )
            )
    columns = (
        *(">", "mesh", "rules", "remat", ">parts", ">memory"),
        *(">step, ms", ">bounds, ms", ">MFU", "limit"),
    )
    return Table(columns, rows, wrap=("limit",))
