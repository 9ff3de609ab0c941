"""Measuring: faithfulness to the prompt, the instruments themselves, and the shapes inside a U-Net."""
