"""Prompts of the validation samples."""

GENERAL = (
    "A red fox trots through fresh snow at dawn, its breath visible, shot from a low angle.",
    "Waves break over black rocks while gulls circle, slow pan to the right.",
    "A street musician plays the violin in the rain, neon signs mirrored in the puddles.",
    "Close-up of hands shaping a clay bowl on a turning potter's wheel, warm light.",
)
SPRITEWORLD = (
    "a big red fox runs to the right through the snow",
    "a small cat bounces across a meadow",
    "a rocket flies up through the night sky",
    "a blue car circles in the desert",
)
