"""Memory and time of restoring a checkpoint onto another mesh, each in a process of its own.

    python tests/benchmarks/restoring.py [--megabytes=512]

Prints for each pair of layouts the bytes of the shards that the process needs, the peak of its
resident memory over what it had before, and their ratio (at most 1.3 is what we hold).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

#: name: (devices, mesh, spec of every array)
LAYOUTS = {
    "one device": (1, (1, 1), (None, None)),
    "rows over 8": (8, (8, 1), ("a", None)),
    "columns over 8": (8, (8, 1), (None, "a")),
    "2 x 4": (8, (2, 4), ("a", "b")),
    "copies on 4": (4, (4, 1), (None, None)),
}
PAIRS = (
    ("rows over 8", "columns over 8"),
    ("rows over 8", "2 x 4"),
    ("rows over 8", "one device"),
    ("one device", "rows over 8"),
    ("one device", "one device"),
    ("2 x 4", "copies on 4"),
)


def run(action: str, layout: str, folder: str, megabytes: int) -> str:
    """Runs this script's `action` in a process with the layout's devices; returns what it says."""
    count = LAYOUTS[layout][0]
    flags = f"--xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--action", action, "--layout", layout]
    command += ["--folder", folder, f"--megabytes={megabytes}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


def form(layout: str, megabytes: int):
    """The abstract state: eight arrays on the layout's mesh."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    count, shape, spec = LAYOUTS[layout]
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(shape), ("a", "b"))
    rows = megabytes * 2**20 // 8 // 4 // 4096
    sharding = NamedSharding(mesh, P(*spec))
    leaf = jax.ShapeDtypeStruct((rows, 4096), np.float32, sharding=sharding)
    return {f"w{i}": leaf for i in range(8)}


def save(layout: str, folder: str, megabytes: int) -> None:
    """Saves a state."""
    import jax

    from lamina.platform.checkpoints.store import open_store

    state = {
        name: jax.jit(
            lambda: jax.random.normal(jax.random.key(0), leaf.shape),  # noqa: B023
            out_shardings=leaf.sharding,
        )()
        for name, leaf in form(layout, megabytes).items()
    }
    store = open_store(folder)
    store.save(1, state)
    store.close()


def restore(layout: str, folder: str, megabytes: int) -> None:
    """Restores it, and prints needed bytes, peak bytes and seconds."""
    import jax
    import numpy as np

    from lamina.platform.checkpoints.store import open_store

    with tempfile.TemporaryDirectory() as other:  # imports and thread pools are not the restore's
        warm = open_store(other)
        warm.save(1, {"x": jax.numpy.ones(8)})
        warm.restore({"x": jax.numpy.ones(8)})
        warm.close()
    wanted = form(layout, megabytes)
    needed = sum(
        len(leaf.sharding.addressable_devices)
        * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        * leaf.dtype.itemsize
        for leaf in wanted.values()
    )
    store = open_store(folder)
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # forgets the peak so far
    start = time.perf_counter()
    restored = store.restore(wanted)
    seconds = time.perf_counter() - start
    assert restored is not None
    print(needed, memory("VmHWM") - before, f"{seconds:.2f}")
    store.close()


def memory(field: str) -> int:
    """Bytes of a field of this process's status."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(saved: str, wanted: str, megabytes: int) -> tuple[int, int, float]:
    """(bytes needed, peak bytes, seconds) of a restore from one layout to another."""
    with tempfile.TemporaryDirectory() as folder:
        run("save", saved, folder, megabytes)
        needed, peak, seconds = run("restore", wanted, folder, megabytes).split()
    return int(needed), int(peak), float(seconds)


def main() -> None:
    """Measures all pairs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--action", choices=("save", "restore"))
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--folder")
    given = parser.parse_args()
    if given.action:
        action = save if given.action == "save" else restore
        action(given.layout, given.folder, given.megabytes)
        return
    print(
        f"{'saved on':16} {'restored on':16} {'needed':>8} {'peak':>8} {'ratio':>6} {'seconds':>8}"
    )
    for saved, wanted in PAIRS:
        needed, peak, seconds = measure(saved, wanted, given.megabytes)
        sizes = f"{needed >> 20:5} MB {peak >> 20:5} MB {peak / needed:6.2f}"
        print(f"{saved:16} {wanted:16} {sizes} {seconds:8.2f}")


if __name__ == "__main__":
    main()
