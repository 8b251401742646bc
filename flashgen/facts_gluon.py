"""How a Gluon kernel is handed to the compiler without tensors: descriptors stand as types in the signature."""

from __future__ import annotations

from typing import Any

from flashgen.config import KernelConfig
from flashgen.spec import AttentionSpec
from flashgen.variants import by_name, features

_ALIGNED = [["tt.divisibility", 16]]
_OWN_ELEMENTS = {"lse_ptr": "fp32", "counter_ptr": "i32", "turn_ptr": "i32"}


def ast_source(kernel: Any, spec: AttentionSpec, config: KernelConfig, *, constants_have_attributes: bool) -> Any:
    """What `triton.compile` takes: the kernel as an aligned call with whole blocks specialises it.

    Args:
        kernel: the jit function of a rendered Gluon file.
        spec: what it computes.
        config: the knobs; its variant knows the boxes of the descriptors and the other constants.
        constants_have_attributes: whether a launch gives constants empty attributes, which are part of Triton's key.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    variant = by_name(config.variant)
    boxes, values = variant.boxes(spec, config), {**config, **variant.constants(spec, config)}
    fp32_boxes = variant.fp32_boxes(spec, config)
    units = unit_strides(spec)
    element = {"fp16": gl.float16, "bf16": gl.bfloat16}[spec.dtype]
    elements = {**_OWN_ELEMENTS, **features.elements(spec)}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or values.get(name, ...) is None:  # a pointer that is None is a constant, too
            signature[name] = "constexpr"
            constants[(index,)] = values[name]
        elif name in boxes:  # spelled as a launch spells it, to the last blank: the text is part of Triton's key
            box = list(boxes[name])
            layout = gl.NVMMASharedLayout.get_default_for(box, element)
            signature[name] = f"tensordesc<{spec.dtype}{box},{layout!r}>"
        elif name in fp32_boxes:
            box = list(fp32_boxes[name])
            layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(box))
            signature[name] = f"tensordesc<fp32{box},{layout!r}>"
        elif name.endswith("_ptr"):
            signature[name] = f"*{elements.get(name, spec.dtype)}"
            attributes[(index,)] = _ALIGNED
        elif name.endswith("_scale") or name in features.FLOATS:
            signature[name] = "fp32"
        elif "stride" in name and not parameter.do_not_specialize:
            if name in units:
                signature[name] = "constexpr"
                constants[(index,)] = 1
            else:
                signature[name] = "i32"
                attributes[(index,)] = _ALIGNED
        else:
            signature[name] = "i32"
    if constants_have_attributes:
        attributes |= {path: [] for path in constants}
    return GluonASTSource(kernel, signature, constants, dict(sorted(attributes.items())))


def unit_strides(spec: AttentionSpec) -> tuple[str, ...]:
    """Strides that are 1 in a contiguous operand, and so constants of a call's kernel."""
    rows = () if spec.mods is None else spec.mods.program.captures
    last = (f"{row.name}_stride{len(row.shape) - 1}" for row in rows)
    return (*features.UNIT_STRIDES, *last)
