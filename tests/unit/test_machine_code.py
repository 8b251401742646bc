"""The readers of machine code, on excerpts of what Triton compiled (tests/data) and on made-up lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashgen import gcn, sass
from flashgen.disassembly import product_loops

DATA = Path(__file__).resolve().parents[1] / "data"
NUM_WARPS = 4
# Of each excerpt: the class of its products, how many a warp issues for one tile, the rows of the tile (16 keys, head dim 64).
EXCERPTS = {
    "sm_80.sass": ("hmma", 16, 64),
    "sm_90.sass": ("hgmma", 5, 64),
    "sm_100.sass": ("utcmma", 5, 64),
    "sm_120_triton36.sass": ("hmma", 16, 64),
}


def instructions(opcode: str, count: int, first: int) -> str:
    return "\n".join(f"/*{first + 16 * i:04x}*/ {opcode} ;" for i in range(count))


@pytest.mark.parametrize("name", EXCERPTS)
def test_nvidias_main_loop_of_every_kind_of_product(name: str) -> None:
    kind, per_tile, rows = EXCERPTS[name]
    text = (DATA / name).read_text()
    loops, main = product_loops(sass.parse(text)), sass.main_loop(text)
    assert [sass.masked(loop) for loop in loops] == [False, True]
    assert main == loops[0]
    assert main.counts[kind] == per_tile
    assert main.macs(NUM_WARPS) == rows * 16 * (64 + 64)
    # 64 x 16 scores over 128 threads are 8 exponentials, and one or two to rescale a thread's rows.
    assert 9 <= main.counts["mufu"] <= 10
    assert loops[1].selects >= 8 > main.selects and "spill" not in main.counts
    assert main.counts["async_copy"] == 2  # a key tile and a value tile, 16 bytes a thread each


def test_scheduling_notes_are_no_operands() -> None:
    """Triton 3.6's cuobjdump prints them before the semicolon: a branch's address was not read."""
    assert "?trans" in (DATA / "sm_120_triton36.sass").read_text()
    (branch,) = sass.parse("/*0040*/ @!P0 BRA 0x17a0 &req={3} ?WAIT15_END_GROUP;")
    assert branch.target == 0x17A0


def test_amds_main_loop() -> None:
    text = (DATA / "gfx942.amdgcn").read_text()
    loops, main = product_loops(gcn.parse(text)), gcn.main_loop(text)
    assert len(loops) == 2
    assert main == loops[0]
    assert main.selects < loops[1].selects
    assert main.counts["mfma"] == loops[1].counts["mfma"] == 12
    assert main.macs(NUM_WARPS) == 128 * 16 * (64 + 64)
    assert 9 <= main.counts["mufu"] <= 10  # 128 x 16 scores over 256 lanes
    assert {"shared", "global", "shuffle", "wait", "barrier", "scalar"} <= set(main.counts)


def test_amds_resources() -> None:
    text = (DATA / "gfx942.amdgcn").read_text()
    found = gcn.resources(text)
    assert (found.vgprs, found.agprs, found.scratch_bytes) == (124, 0, 0)
    assert found.spill_store_bytes == found.spill_load_bytes == 0 < found.sgprs
    spilled = (
        "\tscratch_store_dwordx4 off, v[0:3], off offset:16 ; 16-byte Folded Spill\n"
        "\tscratch_load_dword v9, off, off offset:4 ; 4-byte Folded Reload\n"
    )
    again = gcn.resources(spilled + text)
    assert (again.spill_store_bytes, again.spill_load_bytes) == (16, 4)
    assert [i.kind for i in gcn.parse(spilled)] == ["spill", "spill"]
    with pytest.raises(ValueError, match="vgprs"):
        gcn.resources("no kernel")


@pytest.mark.parametrize(
    ("line", "kind", "macs"),
    [
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], 0", "mfma", 32 * 32 * 8),
        ("v_mfma_f32_16x16x16_f16 v[0:3], v[0:1], v[2:3], 0", "mfma", 16**3),
        ("v_mfma_f32_4x4x4_16b_f16 a[0:3], v[0:1], v[2:3], a[0:3]", "mfma", 16 * 4**3),
        ("v_exp_f32_e32 v1, v1", "mufu", 0),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", "fp32", 0),
        ("v_mov_b32_dpp v1, v2 quad_perm:[1,0,3,2] row_mask:0xf", "shuffle", 0),
        ("buffer_load_dword v1, s[0:3], 0 offen lds", "async_copy", 0),
        ("buffer_load_dwordx4 v[0:3], v1, s[0:3], 0 offen", "global", 0),
        ("v_accvgpr_read_b32 v1, a1", "accumulator_move", 0),
        ("v_cndmask_b32_e64 v1, v2, v3, s[0:1]", "select", 0),
    ],
)
def test_amds_classes(line: str, kind: str, macs: int) -> None:
    (read,) = gcn.parse(f"\t{line}")
    assert (read.kind, read.macs) == (kind, macs)


@pytest.mark.parametrize(
    ("line", "macs"),
    [
        ("HMMA.16816.F32.BF16 R4, R4, R8, R4", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R4, R8, R4", 16 * 8 * 8),
        ("HGMMA.64x256x16.F32 R24, gdesc[UR4], R24", 64 * 256 * 16 // 4),
        ("HMMA.9999.F32 R4, R4, R8, R4", None),
        # UR23 has no immediate above: the shape is not known, rather than guessed.
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR12], tmem[UR22], idesc[UR23], UPT", None),
        ("MUFU.EX2 R3, R3", 0),
    ],
)
def test_shapes_of_nvidias_products(line: str, macs: int | None) -> None:
    (read,) = sass.parse(f"/*0000*/ {line} ;")
    assert read.macs == macs


def test_the_shape_of_utchmma_stands_in_its_descriptor() -> None:
    product = "/*0010*/ UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR12], tmem[UR22], idesc[UR23], UPT ;"
    read = sass.parse(f"/*0000*/ UMOV UR23, 0x8200490 ;\n{product}")
    assert read[1].macs == 128 * 128 * 16 and read[1].per_block
    overwritten = sass.parse(f"/*0000*/ UMOV UR23, 0x8200490 ;\n/*0008*/ LDCU UR23, c[0x0][0x3a0] ;\n{product}")
    assert overwritten[2].macs is None


def test_a_loop_ends_at_its_last_branch_and_never_spans_an_exit() -> None:
    text = "\n".join(
        (
            instructions("HMMA.16816.F32 R4, R4, R8, R4", 2, 0x10),
            "/*0030*/ @P0 BRA 0x10 ;",
            instructions("HMMA.16816.F32 R4, R4, R8, R4", 3, 0x40),
            "/*0070*/ @P1 BRA 0x10 ;",
            "/*0080*/ EXIT ;",
            "/*0090*/ BRA 0x0 ;",  # a retry stub behind the end
        )
    )
    (loop,) = product_loops(sass.parse(text))
    assert loop.counts["hmma"] == 5 and loop.counts["total"] == 7
    straight = f"{instructions('HMMA.16816.F32 R4, R4, R8, R4', 2, 0x10)}\n/*0030*/ EXIT ;\n/*0040*/ BRA 0x10 ;"
    assert product_loops(sass.parse(straight)) == []


def test_an_unmasked_loop_goes_before_a_masked_one_and_none_is_no_error() -> None:
    body = instructions("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", 1, 0x10)
    masked = "\n".join((body, instructions("FSEL R4, R4, R5, P1", 10, 0x20), "/*00c0*/ @P0 BRA 0x10 ;"))
    plain = "/*0110*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;\n/*0120*/ STL [R1], R3 ;\n/*0130*/ @P0 BRA 0x110 ;"
    loop = sass.main_loop(f"{masked}\n{plain}")
    assert loop is not None and loop.counts == {"total": 3, "hgmma": 1, "other": 1, "spill": 1}
    only = sass.main_loop(masked)
    assert only is not None and only.selects == 10
    assert sass.main_loop("") is None and gcn.main_loop("") is None


def test_registers_that_nothing_wrote_are_found() -> None:
    """The shape of what ptxas 12.8 made of a narrow value tile: an increment of a register before its first write."""
    broken = """
        /*0000*/                   R2UR UR4, R6 ;
        /*0010*/                   UIADD3 UR46, UP0, UR46, 0x20, URZ ;
        /*0020*/                   UMOV UR7, 0xc0000010 ;
        /*0030*/                   USGXT.U32 UR6, UR4, 0xe ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56 ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R56, R32, gdesc[UR48].tnspB, R56 ;
"""
    assert [line.split(":")[0] for line in sass.undefined_registers(broken)] == ["0010", "0050"]
    assert sass.undefined_registers(broken.replace("UR46, 0x20", "UR4, 0x20").split("/*0050*/")[0]) == []


@pytest.mark.parametrize(
    ("lines", "undefined"),
    [
        ("LDCU.64 UR4, c[0x0][0x3a8] | UIADD3 UR6, UPT, UPT, UR5, 0x1, URZ", 0),  # Blackwell's constant loads write
        ("LDCU UR4, c[0x0][0x3a8] | UIADD3 UR6, UPT, UPT, UR5, 0x1, URZ", 1),  # one register only
        ("UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR7", 1),  # writes UR4, reads UR7
        ("UMOV UR7, 0x1 | UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR7 | UMOV UR8, UR4", 0),
        ("UISETP.GE.U32.AND UP0, UPT, UR4, 0x3, UPT", 1),
        ("UISETP.GE.U32.AND UP0, UPT, UR4, UR17, UPT", 1),  # writes a predicate, reads both
        ("UMOV UR4, 0x1 | UISETP.GE.U32.AND UP0, UPT, UR4, 0x3, UPT", 0),
        ("BRXU UR4 -0x10", 1),
        ("MOV.SPILL R72, UR59 | UMOV UR59, 0x4 | R2UR.FILL UR59, R72", 0),  # borrowed and given back, never used
        ("MOV.SPILL R72, UR59 | R2UR.FILL UR59, R72 | UIADD3 UR6, UPT, UPT, UR59, 0x1, URZ", 1),
        ("UMOV UR5, 0x1 | MOV.SPILL R72, UR5 | R2UR.FILL UR6, R72 | UIADD3 UR7, UPT, UPT, UR6, 0x1, URZ", 0),
        ("UMOV UR5, UR9 | UMOV UR5, 0x1 | UIADD3 UR6, UPT, UPT, UR5, 0x1, URZ", 0),  # a copy of nothing, never used
        ("UMOV UR5, 0x1 | UMOV UR5, UR9 | UIADD3 UR6, UPT, UPT, UR5, 0x1, URZ", 1),
        ("S2UR UR4, SR_CTAID.X | IMAD.WIDE R4, R53, UR4, RZ", 0),
    ],
)
def test_what_writes_a_uniform_register(lines: str, undefined: int) -> None:
    text = "\n".join(f"/*{16 * i:04x}*/ {line.strip()} ;" for i, line in enumerate(lines.split("|")))
    assert len(sass.undefined_registers(text)) == undefined
