"""Every kernel that the shipped configs can want on a GPU, for compilation ahead of time and for
the tests; needs no GPU.
"""

from libs.ops.cuda import adaln_plan, fp8_plan


def kernels_of_configs(arch):
    """The kernels for an architecture, 90 for sm_90: those of the operators, of the fused block and
    of products in fp8, as far as that GPU has them; sorted."""
    kernels = set(adaln_plan.INSTANTIATIONS_OF_CONFIGS)
    if arch < adaln_plan.OLDEST_ARCH:
        kernels = {k for k in kernels if ("kOutput", "1") not in k.defines}
    if arch >= fp8_plan.OLDEST_ARCH:
        kernels |= set(fp8_plan.KERNELS)
    return sorted(kernels)
