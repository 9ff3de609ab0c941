"""diffusers' scheduler for each of our samplers."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from gobelin.samplers import SAMPLERS

SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (LCMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "dpm_2": (KDPM2DiscreteScheduler, {}),
    "dpm_2_ancestral": (KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "uni_pc": (UniPCMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
}
SCHEDULERS |= {
    f"{name}_karras": (cls, {**options, "use_karras_sigmas": True})
    for name, (cls, options) in SCHEDULERS.items()
    if f"{name}_karras" in SAMPLERS
}

# Those for which diffusers knows zero terminal SNR.
ZERO_TERMINAL_SNR = ("ddpm", "ddim", "lcm", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "uni_pc")
