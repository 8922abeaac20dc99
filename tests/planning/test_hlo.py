"""A compiled program's text is read right: loops, FLOPs, bytes, on CPU and as TPUs print it."""

import re

import jax
import jax.numpy as jnp
import pytest

from lm.planning import hlo
from lm.planning.hlo_costs import attention_flops, bytes_of, flops_of, stated
from lm.planning.hlo_runs import runs

SIDE, LAYERS = 32, 7
PRODUCT = 2 * SIDE**3
X = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
W = jax.ShapeDtypeStruct((LAYERS, SIDE, SIDE), jnp.float32)


def totals(text):
    """(FLOPs, bytes, whether all loops are known) of a program, trips counted."""
    every = runs(hlo.parse(text))
    return (
        sum(run.trips * flops_of(run.instruction) for run in every),
        sum(run.trips * bytes_of(run.instruction) for run in every),
        all(run.known for run in every),
    )


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def products(function, *arguments):
    """How many products of SIDE × SIDE matrices a function takes."""
    return totals(compiled(function, *arguments).as_text())[0] / PRODUCT


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def unrolled(x, w):
    for layer in range(LAYERS):
        x = jnp.tanh(x @ w[layer])
    return x


def gradient(function):
    return jax.grad(lambda x, w: function(x, w).sum(), (0, 1))


@pytest.mark.parametrize("transform", [lambda f: f, gradient], ids=["forward", "gradient"])
def test_a_scan_counts_as_much_as_the_same_layers_one_by_one(transform):
    expected = products(transform(unrolled), X, W)
    assert expected == (LAYERS if transform is not gradient else 3 * LAYERS)
    assert products(transform(scanned), X, W) == expected


def test_the_compiler_agrees_where_there_is_no_loop_and_falls_short_where_there_is():
    plain, loop = compiled(lambda x, w: x @ w[0], X, W), compiled(scanned, X, W)
    assert totals(plain.as_text())[0] == plain.cost_analysis()["flops"]
    assert totals(loop.as_text())[0] > 5 * loop.cost_analysis()["flops"]


def test_recomputation_is_counted():
    def kept(x, w):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None)), x, w)[0]

    assert products(gradient(kept), X, W) == 4 * LAYERS


def test_loops_within_loops_multiply():
    def nested(x, w):
        return jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=3)[0]

    assert products(nested, X, W) == 3 * LAYERS


@pytest.mark.parametrize("start, stop, step", [(0, 9, 1), (2, 11, 1), (20, 3, -2), (0, 10, 3)])
def test_trips_follow_from_a_loops_condition(start, stop, step):
    def program(x):
        def more(carry):
            return carry[0] < stop if step > 0 else carry[0] > stop

        return jax.lax.while_loop(more, lambda c: (c[0] + step, c[1] @ c[1]), (start, x))[1]

    text = compiled(program, X).as_text()
    # As TPUs print it: nobody says how often.
    without = re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)
    for printed in (text, without):
        assert totals(printed)[0] / PRODUCT == len(range(start, stop, step))
        assert totals(printed)[2]


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    def program(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: x @ x, x)

    flops, _, known = totals(compiled(program, X).as_text())
    assert flops == PRODUCT and not known


def test_of_a_conditional_the_branch_with_most_work_counts():
    def program(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert products(program, X) == 2


def test_convolutions_leave_padding_out():
    image = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((5, 3, 3, 3), jnp.float32)
    program = compiled(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME"), image, kernel
    )
    # Of 3 places a side, the first and the last output see 2, the 6 others 3.
    assert totals(program.as_text())[0] == 2 * 2 * 5 * 3 * (2 * 2 + 6 * 3) ** 2


def test_bytes_of_a_product_are_its_operands_and_result():
    program = compiled(lambda x, y: x @ y, X, X)
    assert totals(program.as_text())[1] == 3 * 4 * SIDE**2


def test_reading_a_slice_of_a_stack_each_trip_reads_the_stack_once():
    _, moved, _ = totals(compiled(scanned, X, W).as_text())
    one = 4 * SIDE**2
    # Weights once; around each product and tanh a few matrices, but never the whole stack.
    assert 3 * LAYERS * one < moved < 9 * LAYERS * one


TPU = """HloModule step, is_scheduled=true

%fused_computation.1 (param_0.63: bf16[6,512,4096], param_1.52: s32[]) -> bf16[1,512,4096] {
  %param_0.63 = bf16[6,512,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.52 = s32[]{:T(128)S(6)} parameter(1)
  %constant.177 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.61 = bf16[1,512,4096]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0.63, %param_1.52, %constant.177, %constant.177), dynamic_slice_sizes={1,512,4096}
}

%fused_computation.2 (param_0.65: bf16[8,1024,2048], param_1.53: bf16[1,2048,4096]) -> bf16[8,1024,4096] {
  %param_0.65 = bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.53 = bf16[1,2048,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
  %bitcast.70 = bf16[2048,4096,1]{1,0,2:T(8,128)(2,1)} bitcast(%param_1.53)
  ROOT %convolution.21 = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} convolution(%param_0.65, %bitcast.70), window={size=1}, dim_labels=0bf_io0->0bf
}

%body (wide.param.2: (s32[], bf16[8,1024,2048], bf16[6,512,4096], bf16[8,1024,4096])) -> (s32[], bf16[8,1024,2048], bf16[6,512,4096], bf16[8,1024,4096]) {
  %wide.param.2 = (s32[]{:T(128)}, bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)}, bf16[6,512,4096]{2,1,0:T(8,128)(2,1)}, bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.0 = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %get-tuple-element.1 = bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=1
  %get-tuple-element.2 = bf16[6,512,4096]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.2), index=2
  %slice.4 = bf16[1,512,4096]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.2, %get-tuple-element.0), kind=kLoop, calls=%fused_computation.1
  %all-gather.15 = bf16[1,2048,4096]{2,1,0:T(8,128)(2,1)} all-gather(%slice.4), channel_id=14, replica_groups=[4,4]<=[8,2]T(1,0), dimensions={1}, use_global_device_ids=true
  %fusion.4 = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.1, %all-gather.15), kind=kOutput, calls=%fused_computation.2, metadata={op_name="jit(step)/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"647832"}}
  %kernel.1 = bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)} custom-call(%get-tuple-element.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, backend_config={"custom_call_config":{"body":"TUzvUg","cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"99"}}}
  %one = s32[]{:T(128)} constant(1)
  %add.50 = s32[]{:T(128)} add(%get-tuple-element.0, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)}, bf16[6,512,4096]{2,1,0:T(8,128)(2,1)}, /*index=3*/bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)}) tuple(%add.50, %kernel.1, %get-tuple-element.2, %fusion.4)
}

%condition (wide.param.1: (s32[], bf16[8,1024,2048], bf16[6,512,4096], bf16[8,1024,4096])) -> pred[] {
  %wide.param.1 = (s32[]{:T(128)}, bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)}, bf16[6,512,4096]{2,1,0:T(8,128)(2,1)}, bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.250 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %constant.62 = s32[]{:T(128)} constant(6)
  ROOT %lt.11 = pred[]{:T(512)} compare(%get-tuple-element.250, %constant.62), direction=LT
}

ENTRY %main.5_spmd (param.0: bf16[8,1024,2048], param.1: bf16[6,512,4096]) -> bf16[8,1024,4096] {
  %param.0 = bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param.1 = bf16[6,512,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
  %constant.9 = s32[]{:T(128)} constant(0)
  %copy.11 = s32[]{:T(128)} copy(%constant.9)
  %custom-call.1 = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %tuple.54 = (s32[]{:T(128)}, bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)}, bf16[6,512,4096]{2,1,0:T(8,128)(2,1)}, /*index=3*/bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)}) tuple(%copy.11, %param.0, %param.1, %custom-call.1)
  %while.29 = (s32[]{:T(128)}, bf16[8,1024,2048]{2,1,0:T(8,128)(2,1)}, bf16[6,512,4096]{2,1,0:T(8,128)(2,1)}, /*index=3*/bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)}) while(%tuple.54), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %get-tuple-element.9 = bf16[8,1024,4096]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.29), index=3
}
"""  # noqa: E501


def test_the_text_of_a_tpu_program_is_understood():
    flops, moved, known = totals(TPU)
    assert known
    assert flops == 6 * (2 * 8 * 1024 * 2048 * 4096 + 1000)
    weights = 2 * 512 * 4096  # of a layer, read from HBM into the chip's own memory (S(1))
    gathered, activations, hidden = 4 * weights, 2 * 8 * 1024 * 2048, 2 * 8 * 1024 * 4096
    kernel = 2 * activations
    each = weights + gathered + (activations + gathered + hidden) + kernel
    assert moved == pytest.approx(6 * each, rel=1e-6)
    kernel = hlo.parse(TPU).module["body"].instructions["kernel.1"]
    assert stated(kernel, "bytes_accessed") == 99


def test_what_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f { func.func public @main() }")


def test_a_layer_of_a_stack_that_is_tiled_anew_is_all_that_is_read_of_it():
    """As a TPU's compiler reads int8 weights under a loop."""
    text = """
%retiled (input: s8[16,8,128]) -> s8[16,8,128] {
  %input = s8[16,8,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy.8 = s8[16,8,128]{2,1,0:T(8,128)(4,1)} copy(%input)
}

%layer (stack: s8[16,8,128], index: s32[]) -> s8[1,8,128] {
  %stack = s8[16,8,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %fusion.1 = s8[16,8,128]{2,1,0} fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = s8[1,8,128]{2,1,0} dynamic-slice(%fusion.1, %index, %zero, %zero), dynamic_slice_sizes={1,8,128}
}

ENTRY %main (stack.1: s8[16,8,128], index.1: s32[]) -> s8[1,8,128] {
  %stack.1 = s8[16,8,128]{2,1,0} parameter(0)
  %index.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %out = s8[1,8,128]{2,1,0} fusion(%stack.1, %index.1), kind=kLoop, calls=%layer
}
"""  # noqa: E501
    assert bytes_of(hlo.parse(text).root) == 2 * 8 * 128


def test_the_kernel_of_pages_reads_those_of_its_table_and_a_scatter_writes_in_place():
    text = """
%write (pool: bf16[90,64,2,128], at: s32[8,2], new: bf16[8,2,128]) -> bf16[90,64,2,128] {
  %pool = bf16[90,64,2,128]{3,2,1,0} parameter(0)
  %at = s32[8,2]{1,0} parameter(1)
  %new = bf16[8,2,128]{2,1,0} parameter(2)
  ROOT %scatter = bf16[90,64,2,128]{3,2,1,0} scatter(%pool, %at, %new), to_apply=%add
}

ENTRY %main (p0: bf16[90,64,2,128], p1: s32[8,2], p2: bf16[8,2,128], p3: s32[8], p4: s32[8,4], p5: s32[9], p6: s32[2], p7: s32[1], p8: bf16[8,4,128]) -> bf16[8,4,128] {
  %p0 = bf16[90,64,2,128]{3,2,1,0} parameter(0)
  %p1 = s32[8,2]{1,0:S(1)} parameter(1)
  %p2 = bf16[8,2,128]{2,1,0:S(1)} parameter(2)
  %p3 = s32[8]{0:S(6)} parameter(3)
  %p4 = s32[8,4]{1,0:S(6)} parameter(4)
  %p5 = s32[9]{0:S(6)} parameter(5)
  %p6 = s32[2]{0:S(6)} parameter(6)
  %p7 = s32[1]{0:S(6)} parameter(7)
  %p8 = bf16[8,4,128]{2,1,0:S(1)} parameter(8)
  %written = bf16[90,64,2,128]{3,2,1,0} fusion(%p0, %p1, %p2), kind=kCustom, calls=%write
  ROOT %ragged_paged_attention_kernel.1 = bf16[8,4,128]{2,1,0:S(1)} custom-call(%p3, %p4, %p5, %p6, %p7, %p8, %written), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501
    kernel = hlo.parse(text).root
    pages = 8 * 4 * 64 * 2 * 128 * 2  # four of each row
    assert bytes_of(kernel) == pages
    assert attention_flops(kernel) == 4 * 8 * 4 * 128 * (4 * 64)
    assert bytes_of(kernel.operands[-1]) == 2 * 8 * 2 * 128 * 2  # what was there is read
