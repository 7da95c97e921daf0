"""Each warning is given for the program it is about, and not for its harmless neighbour.

The programs are cut out of what the TPU compiler (libtpu 0.0.52) wrote for v5e, with smaller
arrays and without what doesn't matter here.
"""

import numpy as np
import pytest

from lamina.sharding.pods import chips, collectives, hlo, loops, products, torus, traffic, warnings

HEAD = "HloModule jit_step, is_scheduled=true\n\n"


def layout(devices=16, slices=1, axis="fsdp"):
    places = [[s, i // 4, i % 4, 0] for s in range(slices) for i in range(devices)]
    shape = {axis: slices, "tensor": devices} if slices > 1 else {axis: devices}
    return torus.Layout(chips.CHIPS["v5e"], shape, np.array(places), (4, 4, 1))


def read(text, where=None):
    module = hlo.parse(HEAD + text)
    schedule = loops.schedule(module)
    found = collectives.collectives(module, schedule, where or layout())
    return module, schedule, found


# --- asynchronous and fused collectives ------------------------------------------------------------

ASYNC = """
%start (p: bf16[1,512,256]) -> (bf16[1,512,256], bf16[16,512,256]) {
  %p = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,512,256]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=27, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  ROOT %custom-call.1 = (bf16[1,512,256]{2,1,0:T(8,128)(2,1)}, bf16[16,512,256]{2,1,0:T(8,128)(2,1)S(1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (q: bf16[1,512,256]) -> bf16[16,512,256] {
  %q = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,512,256]{2,1,0:T(8,128)(2,1)} all-gather(%q), channel_id=27, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, use_global_device_ids=true
}

%all-reduce-scatter (input: f32[64,64]) -> f32[4,64] {
  %input = f32[64,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,64]{1,0:T(8,128)} all-reduce(%input), channel_id=3, replica_groups=[1,16]<=[16], use_global_device_ids=true, to_apply=%add
  %partition-id.1 = u32[]{:T(128)} partition-id()
  ROOT %dynamic-slice.1 = f32[4,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %partition-id.1), dynamic_slice_sizes={4,64}
}

ENTRY %main (a: bf16[1,512,256], b: f32[64,64]) -> f32[4,64] {
  %a = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,64]{1,0:T(8,128)} parameter(1)
  %fusion.1 = (bf16[1,512,256]{2,1,0:T(8,128)(2,1)}, bf16[16,512,256]{2,1,0:T(8,128)(2,1)S(1)}) fusion(%a), kind=kCustom, calls=%start
  %fusion.2 = bf16[16,512,256]{2,1,0:T(8,128)(2,1)} fusion(%a), kind=kOutput, calls=%piece
  %fusion.3 = bf16[16,512,256]{2,1,0:T(8,128)(2,1)} fusion(%a), kind=kOutput, calls=%piece
  ROOT %fusion.4 = f32[4,64]{1,0:T(8,128)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_an_asynchronous_gather_counts_once_and_overlaps_and_a_fused_scatter_is_one():
    gather, scatter = read(ASYNC)[2]
    assert (gather.kind, gather.bytes, gather.overlapped) == (
        "all-gather",
        16 * 512 * 256 * 2,
        True,
    )
    assert (scatter.kind, scatter.bytes, scatter.overlapped) == (
        "reduce-scatter",
        64 * 64 * 4,
        False,
    )
    assert gather.axes == scatter.axes == ("fsdp",)


# --- cross-slice traffic ---------------------------------------------------------------------------

SEND = """
ENTRY %main (a: f32[4,8,128]) -> token[] {
  %a = f32[4,8,128]{2,1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[4,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%a, %after-all), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %send-done = token[] send-done(%send), channel_id=4, is_host_transfer=true
}
"""


def test_traffic_between_slices_is_a_send_to_the_host():
    (found,) = read(SEND, layout(slices=2, axis="data"))[2]
    assert (found.kind, found.axes) == ("cross-slice all-reduce", ("data",))
    assert found.bytes == 4 * 8 * 128 * 4
    assert found.seconds == found.bytes / chips.CHIPS["v5e"].network


def test_a_send_to_the_host_that_megascale_does_not_reduce_is_none():
    assert read(SEND.replace("xla_megascale_runtime", "other").replace("megascale", "x"))[2] == []


def test_islands_are_warned_when_their_inner_step_crosses_slices():
    islands = layout(slices=2, axis="replica")
    _, _, found = read(SEND, islands)
    (said,) = warnings.crossing_slices(found, islands.shape, islands.slice_axes())
    assert "inner step of islands crosses slices: 1 transfers" in said
    data = layout(slices=2, axis="data")
    assert not list(warnings.crossing_slices(found, data.shape, data.slice_axes()))
    assert not list(warnings.crossing_slices([], islands.shape, islands.slice_axes()))


def test_transfers_between_slices_in_a_loop_are_warned_of():
    _, _, (found,) = read(SEND, layout(slices=2, axis="data"))
    looped = found._replace(depth=1, times=32)
    (first, *_) = warnings.crossing_slices([looped], {"data": 2}, ("data",))
    assert "inside a loop: 32 transfers" in first


# --- a head gathered again in a loop ---------------------------------------------------------------

GATHERED = """
%condition (p: (s32[], bf16[64,4096], bf16[8,64,4096])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %p = (s32[], bf16[64,4096]{1,0}, bf16[8,64,4096]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (q: (s32[], bf16[64,4096], bf16[8,64,4096])) -> (s32[], bf16[64,4096], bf16[8,64,4096]) {
  %one = s32[]{:T(128)} constant(1)
  %q = (s32[], bf16[64,4096]{1,0}, bf16[8,64,4096]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %head = bf16[64,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
  %stack = bf16[8,64,4096]{2,1,0:T(8,128)(2,1)} get-tuple-element(%q), index=2
  %layer = bf16[1,64,4096]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %j), dynamic_slice_sizes={1,64,4096}
  %all-gather.7 = bf16[1024,4096]{1,0:T(8,128)(2,1)} all-gather(WHICH), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/head/dot_general"}
  %next = s32[]{:T(128)} add(%j, %one)
  ROOT %tuple = (s32[], bf16[64,4096]{1,0}, bf16[8,64,4096]{2,1,0}) tuple(%next, %head, %stack)
}

ENTRY %main (a: bf16[64,4096], b: bf16[8,64,4096]) -> (s32[], bf16[64,4096], bf16[8,64,4096]) {
  %a = bf16[64,4096]{1,0} parameter(0)
  %b = bf16[8,64,4096]{2,1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], bf16[64,4096]{1,0}, bf16[8,64,4096]{2,1,0}) tuple(%zero, %a, %b)
  ROOT %loop = (s32[], bf16[64,4096]{1,0}, bf16[8,64,4096]{2,1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_head_that_is_gathered_in_every_round_of_a_loop_is_warned_of():
    (said,) = warnings.gathered_in_loops(*read(GATHERED.replace("WHICH", "%head")))
    assert "8.4 MB, 8 times" in said
    assert "head/dot_general" in said


def test_a_layers_own_kernel_is_gathered_in_a_loop_without_a_warning():
    assert not list(warnings.gathered_in_loops(*read(GATHERED.replace("WHICH", "%layer"))))


# --- reductions of which a slice is kept -----------------------------------------------------------

REDUCED = """
ENTRY %main (g: f32[4096,1024], i: s32[]) -> f32[256,1024] {
  %g = f32[4096,1024]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %all-reduce.1 = f32[4096,1024]{1,0:T(8,128)} all-reduce(%g), channel_id=1, replica_groups=[1,16]<=[16], use_global_device_ids=true, to_apply=%add
  ROOT %last = LAST
}
"""


def test_an_all_reduce_whose_result_is_sliced_is_warned_of():
    sliced = "f32[256,1024]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={256,1024}"
    module, schedule, _ = read(REDUCED.replace("LAST", sliced))
    (said,) = warnings.reduced_then_sliced(module, schedule)
    assert "1 a step, 17 MB" in said


def test_an_all_reduce_whose_result_is_used_whole_is_not():
    whole = "f32[4096,1024]{1,0:T(8,128)} negate(%all-reduce.1)"
    module, schedule, _ = read(REDUCED.replace("LAST", whole))
    assert not list(warnings.reduced_then_sliced(module, schedule))


# --- attention, embeddings, shards, memory ---------------------------------------------------------

ATTENTION = """
ENTRY %main (q: bf16[8,4096,128], k: bf16[8,4096,128]) -> f32[8,4096,4096] {
  %q = bf16[8,4096,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[8,4096,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %logits = f32[8,4096,4096]{2,1,0:T(8,128)} convolution(%q, %k), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
}
"""


def test_plain_attention_is_warned_of_at_long_sequences_only():
    module, schedule, _ = read(ATTENTION)
    (said,) = warnings.plain_attention(schedule, 4096, kernels=False)
    assert "537 MB" in said
    assert not list(warnings.plain_attention(schedule, 4096, kernels=True))
    assert not list(warnings.plain_attention(schedule, 1024, kernels=False))
    root = module.computations["main"].instructions["logits"]
    flops = products.products(module, module.computations["main"], root).flops
    assert flops == 2 * 8 * 4096 * 4096 * 128  # the batch has become a window


def test_a_lookup_in_a_table_split_along_its_width_is_warned_of():
    text = """
ENTRY %main (t: f32[32000,WIDTH], i: s32[262144]) -> f32[262144,WIDTH] {
  %t = f32[32000,WIDTH]{1,0:T(8,128)} parameter(0)
  %i = s32[262144]{0:T(1024)} parameter(1)
  ROOT %gather.1 = f32[262144,WIDTH]{1,0:T(8,128)} gather(%t, %i), offset_dims={1}
}
"""
    (said,) = warnings.narrow_gathers(hlo.parse(HEAD + text.replace("WIDTH", "8")))
    assert "pads 8 columns to 128, 134 MB" in said
    assert not list(warnings.narrow_gathers(hlo.parse(HEAD + text.replace("WIDTH", "256"))))


def test_shards_thinner_than_a_tile_are_warned_of():
    (said,) = warnings.thin_shards([("a/kernel", (4096, 512), (8, 512)), ("b", (64,), (8,))])
    assert "1 parameters" in said
    assert "a/kernel into 8" in said
    assert not list(warnings.thin_shards([("a/kernel", (4096, 512), (16, 512))]))


def test_a_program_larger_than_the_usable_memory_is_warned_of():
    chip = chips.CHIPS["v5e"]
    (said,) = warnings.memory(20 * chips.GIB, chip)
    assert "20.00 GiB of 15.75 GiB" in said
    assert not list(warnings.memory(15 * chips.GIB, chip))


UNREAD = """
%condition (p: (f32[64,64])) -> pred[] {
  %p = (f32[64,64]{1,0}) parameter(0)
  ROOT %done = pred[]{:T(512)} custom-call(%p), custom_call_target="Done"
}

%body (q: (f32[64,64])) -> (f32[64,64]) {
  %q = (f32[64,64]{1,0}) parameter(0)
  %x = f32[64,64]{1,0:T(8,128)} get-tuple-element(%q), index=0
  %y = f32[64,64]{1,0:T(8,128)} WORK
  ROOT %tuple = (f32[64,64]{1,0}) tuple(%y)
}

ENTRY %main (a: f32[64,64]) -> (f32[64,64]) {
  %a = f32[64,64]{1,0} parameter(0)
  %start = (f32[64,64]{1,0}) tuple(%a)
  ROOT %loop = (f32[64,64]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_of_unknown_length_is_warned_of_if_it_multiplies():
    product = "convolution(%x, %x), dim_labels=bf_io->bf"
    module, schedule, _ = read(UNREAD.replace("WORK", product))
    (said,) = warnings.unread(module, schedule)
    assert "the loop loop" in said
    module, schedule, _ = read(UNREAD.replace("WORK", "negate(%x)"))
    assert not list(warnings.unread(module, schedule))


# --- traffic to HBM --------------------------------------------------------------------------------

STACKED = """
%slice_of_stack (p: f32[32,1024,128], i: s32[]) -> f32[1,1024,128] {
  %p = f32[32,1024,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1,1024,128]{2,1,0:T(8,128)} dynamic-slice(%p, %i), dynamic_slice_sizes={1,1024,128}
}

%outer (p2: f32[32,1024,128], i2: s32[]) -> f32[1,1024,128] {
  %p2 = f32[32,1024,128]{2,1,0:T(8,128)} parameter(0)
  %i2 = s32[]{:T(128)} parameter(1)
  %inner = f32[1,1024,128]{2,1,0:T(8,128)} fusion(%p2, %i2), kind=kLoop, calls=%slice_of_stack
  ROOT %negate = f32[1,1024,128]{2,1,0:T(8,128)} negate(%inner)
}

ENTRY %main (a: f32[32,1024,128], i: s32[]) -> f32[1,1024,128] {
  %a = f32[32,1024,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %fusion.1 = f32[1,1024,128]{2,1,0:T(8,128)SPACE} fusion(%a, %i), kind=kLoop, calls=%outer
}
"""


@pytest.mark.parametrize(("space", "arrays"), [("", 2), ("S(1)", 1)])
def test_a_slice_of_a_stack_counts_as_the_slice_and_vmem_as_nothing(space, arrays):
    module = hlo.parse(HEAD + STACKED.replace("SPACE", space))
    main = module.computations["main"]
    moved = traffic.hbm_bytes(module, main, main.instructions["fusion.1"])
    assert moved == pytest.approx(arrays * 1024 * 128 * 4, abs=8)
