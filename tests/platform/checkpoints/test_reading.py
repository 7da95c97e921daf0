"""A restore reads each stored chunk once, and needs little more memory than its result."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform.checkpoints import arrays, reading
from lamina.platform.checkpoints.store import open_store

ROOT = Path(__file__).parents[3]


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK", 4096)
    monkeypatch.setattr(arrays, "_CRUMB", 64)
    monkeypatch.setattr(reading, "_PIECE", 1500)


@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P("b", "a"), P(), P(None, None, "a")])
def test_chunks_and_pieces_make_the_same_array(tmp_path, small_chunks, spec):
    value = jax.random.normal(jax.random.key(0), (24, 40, 6))
    store = open_store(tmp_path)
    store.save(1, {"w": jax.device_put(value, NamedSharding(mesh(), P("b", None, "a")))})
    wanted = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh(), spec))
    restored = store.restore({"w": wanted})
    store.close()
    assert restored.state["w"].sharding.spec == spec
    np.testing.assert_array_equal(restored.state["w"], value)


def test_each_chunk_is_read_once_whatever_the_mesh(tmp_path, small_chunks, monkeypatch):
    value = jnp.arange(64 * 128, dtype=jnp.float32).reshape(64, 128)
    store = open_store(tmp_path)
    store.save(1, {"w": jax.device_put(value, NamedSharding(mesh(), P("a")))})
    store.wait()
    sizes = []
    start = reading._Read.start
    monkeypatch.setattr(
        reading._Read, "start", lambda self: sizes.append(self.nbytes) or start(self)
    )
    columns = NamedSharding(mesh(), P(None, ("a", "b")))
    store.restore({"w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=columns)})
    store.close()
    assert sum(sizes) == value.nbytes
    assert max(sizes) <= 4096


def test_only_what_the_devices_need_is_read(tmp_path, small_chunks, monkeypatch):
    value = jnp.arange(64 * 128, dtype=jnp.float32).reshape(64, 128)
    store = open_store(tmp_path)
    store.save(1, {"w": value})
    store.close()
    whole = NamedSharding(mesh(), P("b"))
    monkeypatch.setattr(
        NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {jax.devices()[0]: (slice(16, 32), slice(None))},
    )
    want = reading.Wanted("w", jax.ShapeDtypeStruct(value.shape, value.dtype), whole)
    assembly = reading._Assembly(
        reading.ts.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/1/", "path": "w/"},
            }
        ).result(),
        want,
    )
    assert sum(step.nbytes for step in assembly.reads()) == value.nbytes // 4


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((4096, 4096), 4 << 20),
        ((50257, 768), 8 << 20),
        ((50304, 768), 4 << 20),
        ((50021, 768), None),
        ((5_000_011,), None),
    ],
)
def test_shards_are_cut_where_that_leaves_no_crumbs(shape, chunk):
    leaf = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    assert arrays.chunk_bytes(leaf) == chunk


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("rows over 8", "columns over 8"), ("one device", "one device")])
def test_a_restore_onto_another_mesh_peaks_below_1_3_times_its_shards(pair):
    path = ROOT / "tests" / "benchmarks" / "restoring.py"
    spec = importlib.util.spec_from_file_location("benchmark_restoring", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    needed, peak, _ = module.measure(*pair, 512)
    assert needed == 512 << 20
    assert peak <= 1.3 * needed
