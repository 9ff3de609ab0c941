"""Control how images are painted, by the words of their prompts.

Pass one control or several as ``control=`` to a pipeline: they compose, for prompts of any length, in any batch. A
plain function ``(site, probs) -> probs`` of attention probabilities is a control too, and so is any object with a
method ``attach(batch)`` (:mod:`gobelin.control.batch`).
"""

from gobelin.attention import AttentionEdit, AttentionPatch
from gobelin.control.attention_control import Region, prompt_to_prompt, regional_attention, reweight, suppress
from gobelin.control.attention_guidance import AttentionGuidance, attend_and_excite, box_guidance
from gobelin.control.batch import AnyControl, Attached, Batch, Control
from gobelin.control.flow_edit import EditGuidance, FlowEdit
from gobelin.control.local_blend import LocalBlend

__all__ = [
    "AnyControl",
    "Attached",
    "AttentionEdit",
    "AttentionGuidance",
    "AttentionPatch",
    "Batch",
    "Control",
    "EditGuidance",
    "FlowEdit",
    "LocalBlend",
    "Region",
    "attend_and_excite",
    "box_guidance",
    "prompt_to_prompt",
    "regional_attention",
    "reweight",
    "suppress",
]
