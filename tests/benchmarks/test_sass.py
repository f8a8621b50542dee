"""What is read off the machine code of GPU kernels."""

import pytest
from ffw_fast.benchmarks import sass

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x00000a0000017a02 */
        /*0010*/               @P0 LDG.E.128.CONSTANT R4, [R2.64] ;    /* 0x0000000402047981 */
        /*0020*/              @!P0 LDG.E.U16 R8, [R2.64] ;             /* 0x0000000402087981 */
        /*0030*/                   STL [R1], R4 ;                      /* 0x0000000401007387 */
        /*0040*/                   F2F.F64.F32 R4, R8 ;                /* 0x0000000800047310 */
        /*0050*/                   SHFL.IDX PT, R4, R4, R5, R6 ;       /* 0x0000000504047389 */
        /*0060*/                   RET.REL.NODEC R2 0x0 ;              /* 0xfffffff002007950 */
        /*0070*/                   FFMA R4, R4, R4, R4 ;               /* 0x0000000404047223 */
        /*0080*/                   DADD R4, R4, R6 ;                   /* 0x0000000004047229 */
        /*0090*/                   MUFU.RCP R3, R4 ;                   /* 0x0000000400037308 */
        /*00a0*/                   FFMA R4, R4, R4, R4 ;               /* 0x0000000404047223 */
        /*00b0*/                   RET.REL.NODEC R2 0x0 ;              /* 0xfffffff002007950 */
"""


def test_what_a_listing_says():
    opcodes = sass.opcodes_of(LISTING)
    assert opcodes[:4] == ["MOV", "LDG.E.128.CONSTANT", "LDG.E.U16", "STL"]
    code = sass.Sass(32, 0, opcodes)
    assert (len(opcodes), code.spills, code.doubles) == (12, 1, 2)
    assert code.subroutines == 1, "the first return is that of a shuffle"


def test_the_widest_access():
    def widest(*opcodes: str) -> int:
        return sass.Sass(32, 0, list(opcodes)).load_bits

    assert widest("LDG.E", "LDG.E.128.CONSTANT", "LDG.E.U16") == 128
    assert widest("LDG.E", "LDG.E.U16") == 32
    assert widest("STG.E.128") == 0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [(32, 0, 4, 16), (64, 0, 4, 8), (65, 0, 4, 7), (255, 0, 8, 1), (32, 40 * 1024, 4, 4), (32, 0, 1, 32)],
)
def test_resident_blocks(registers, shared, warps, blocks):
    assert sass.resident_blocks(sass.LIMITS[80], registers, shared, warps) == blocks
