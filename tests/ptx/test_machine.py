"""The interpreter refuses what a GPU leaves undefined: each of these programs is wrong in one way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.kernel import Interpreted
from ptx.program import Fault

HEAD = """.version 8.1
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 sums[];
"""


def kernel(body: str, threads: int = 64, cluster: int = 1, functions: str = "") -> Interpreted:
    """One that loads x and stores to y; ``body`` begins with their addresses in %d0, %d1 and %tid.x in %r0."""
    directives = f".reqntid {threads}\n.maxnreg 64\n"
    if cluster > 1:
        directives += ".explicitcluster\n"
    start = """
	.reg .pred %p<4>;
	.reg .b16 %h<4>;
	.reg .b32 %r<8>;
	.reg .b64 %d<8>;
	.reg .f32 %f<8>;
	ld.param.b64 %d0, [x];
	ld.param.b64 %d1, [y];
	mov.u32 %r0, %tid.x;
	mad.wide.s32 %d2, %r0, 4, %d0;
	mad.wide.s32 %d3, %r0, 4, %d1;
"""
    entry = f".visible .entry test(.param .u64 x, .param .u64 y)\n{directives}{{{start}"
    return Interpreted(HEAD + functions + entry + "\n".join(f"\t{line}" for line in body.splitlines()) + "\n}\n")


def run(one: Interpreted, threads: int = 64, cluster: int = 1, size: int = 64) -> torch.Tensor:
    x, y = torch.arange(float(size)), torch.full((size,), torch.nan)
    one.launch(
        (1, 1, cluster), (threads, 1, 1), (x, y), shared_bytes=1024, cluster=(1, 1, cluster) if cluster > 1 else None
    )
    return y


COPY = "ld.global.f32 %f0, [%d2];\nst.global.f32 [%d3], %f0;\nexit;"
TURN = """mov.u32 %r1, sums;
mad.lo.u32 %r2, %r0, 4, %r1;
ld.global.f32 %f0, [%d2];
st.shared.f32 [%r2+0], %f0;
bar.sync 0;
mad.lo.s32 %r3, %r0, -4, %r1;
ld.shared.f32 %f1, [%r3+252];
st.global.f32 [%d3], %f1;
exit;"""
SEND = """mov.u32 %r1, sums;
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared.b64 [%r1], 1;
fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.relaxed.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r2, %ctaid.z;
setp.lt.u32 %p1, %r2, 1;
@%p1 bra TAKE;
mad.lo.u32 %r3, %r0, 4, %r1;
mapa.shared::cluster.u32 %r4, %r3, 0;
mapa.shared::cluster.u32 %r5, %r1, 0;
ld.global.f32 %f0, [%d2];
st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%r4+16], %f0, [%r5+0];
exit;
TAKE:
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+0], 256;
AGAIN:
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r1+0], 0;
@%p2 bra HERE;
bra AGAIN;
HERE:
mad.lo.u32 %r3, %r0, 4, %r1;
ld.shared.f32 %f1, [%r3+16];
st.global.f32 [%d3], %f1;
exit;"""


def test_it_computes() -> None:
    assert torch.equal(run(kernel(COPY)), torch.arange(64.0))
    assert torch.equal(run(kernel(TURN)), torch.arange(64.0).flip(0))
    assert torch.equal(run(kernel(SEND, cluster=2), cluster=2), torch.arange(64.0))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (COPY.replace("%f0, [%d2]", "%f1, [%d2]"), "%f0 is read before"),
        (COPY.replace("[%d2]", "[%d2+4]"), "no buffer"),
        (COPY.replace("[%d2]", "[%d2+2]"), "no multiple of 4"),
        (COPY.replace("[%d2]", "[%d3]"), "not readable"),
        (COPY.replace("[%d3]", "[%d2]"), "not writable"),
        (COPY.replace("[%d3]", "[%d1]"), "different values to one place"),
        (COPY.replace("%f0", "%q0"), "not declared"),
        (COPY.replace("ld.global.f32 %f0", "ld.global.b16 %f0"), "does not hold"),
        (COPY.replace("exit;", ""), "without an exit"),
        (COPY.replace("exit;", "sin.approx.f32 %f0, %f0;\nexit;"), "not an instruction"),
        (COPY.replace("st.global", "setp.lt.u32 %p0, %r0, 8;\n@%p0 st.global"), "only branches"),
        ("setp.lt.u32 %p0, %r0, 8;\n@%p0 ld.global.f32 %f0, [%d2];\nexit;", "%f0 is read before"),
        (TURN.replace("bar.sync 0;", ""), "between the same barriers"),
        (TURN.replace("+252", "+1024"), "beyond the end"),
        (TURN.replace("st.shared.f32 [%r2+0], %f0;", ""), "nobody stored"),
        (TURN.replace("bar.sync", "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra END;\nbar.sync").replace("exit", "END:\nexit"),
         "not all threads"),
        (TURN.replace("bar.sync", "setp.lt.u32 %p0, %r0, 8;\n@%p0 bra END;\nbar.sync").replace("exit", "END:\nexit"),
         "part of a warp"),
    ],
)  # fmt: skip
def test_what_is_undefined_is_refused(body: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(kernel(body))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (SEND.replace("], 256", "], 260"), "never come"),
        (SEND.replace("], 256", "], 252"), "never come"),
        (SEND.replace("@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+0], 256;", ""), "never come"),
        (SEND.replace("HERE:", "HERE:\nmapa.shared::cluster.u32 %r6, %r1, 2;").replace("[%r4+16]", "[%r3+16]"),
         "no address of the cluster"),
        (SEND.replace("[%r4+16]", "[%r4+1020]"), "beyond the end"),
        (SEND.replace("[%r4+16]", "[%r4+0]"), "touches a barrier"),
        (SEND.replace("[%r5+0]", "[%r5+8]"), "counts at no barrier"),
        (SEND.replace("@%p0 mbarrier.init.shared.b64 [%r1], 1;", ""), "no barrier"),
        (SEND.replace("barrier.cluster.arrive.relaxed.aligned;", ""), "without having arrived"),
        (SEND.replace("AGAIN:", "bra HERE;\nAGAIN:"), "not waited for"),
    ],
)  # fmt: skip
def test_what_is_undefined_in_a_cluster_is_refused(body: str, words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(kernel(body, cluster=2), cluster=2)


def test_a_launch_must_be_what_the_kernel_was_written_for() -> None:
    with pytest.raises(Fault, match="not what the kernel is written for"):
        run(kernel(COPY), threads=32)
    with pytest.raises(Fault, match="not what the kernel is written for"):
        run(kernel(SEND, cluster=2), cluster=1)


def test_gaps_of_a_tensor_may_not_be_touched() -> None:
    x, y = torch.arange(128.0).reshape(2, 64)[:, :32], torch.zeros(64)
    with pytest.raises(Fault, match="not readable"):
        kernel(COPY).launch((1, 1, 1), (64, 1, 1), (x, y))


def test_functions_are_called_with_what_was_stored_for_them() -> None:
    function = """.func scale(.param .b64 y, .param .b32 by)
.noreturn
{
	.reg .b64 %d<2>;
	.reg .b32 %r<2>;
	.reg .f32 %f<2>;
	ld.param.b64 %d0, [y];
	ld.param.b32 %r0, [by];
	mov.b32 %f0, %r0;
	st.global.f32 [%d0], %f0;
	exit;
}
"""
    body = """mov.f32 %f0, 0f40400000;
mov.b32 %r1, %f0;
{
.param .b64 a0;
st.param.b64 [a0], %d3;
.param .b32 a1;
st.param.b32 [a1], %r1;
call.uni scale, (a0, a1);
}
exit;"""
    assert torch.equal(run(kernel(body, functions=function)), torch.full((64,), 3.0))
    with pytest.raises(Fault, match="returns"):
        run(kernel(body, functions=function.replace(".noreturn\n", "")))


@pytest.mark.parametrize(
    ("instruction", "value", "want"),
    [
        ("cvt.rn.f16.f32 %h0, %f0", 1.0 + 2**-11, 1.0),
        ("cvt.rn.f16.f32 %h0, %f0", 1.0 + 3 * 2**-11, 1.0 + 2**-9),
        ("cvt.rn.bf16.f32 %h0, %f0", 1.0 + 2**-8, 1.0),
        ("cvt.rn.bf16.f32 %h0, %f0", 1.0 + 3 * 2**-8, 1.0 + 2**-6),
    ],
)
def test_halves_are_rounded_to_even(instruction: str, value: float, want: float) -> None:
    back = (
        "cvt.f32.f16 %f1, %h0;"
        if "bf16" not in instruction
        else "cvt.u32.u16 %r1, %h0;\nshl.b32 %r1, %r1, 16;\nmov.b32 %f1, %r1;"
    )
    bits = np.array(value, np.float32).view(np.uint32)
    body = f"mov.f32 %f0, 0f{int(bits):08X};\n{instruction};\n{back}\nst.global.f32 [%d3], %f1;\nexit;"
    assert run(kernel(body))[0] == want
