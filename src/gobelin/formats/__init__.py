"""File formats: safetensors, pickles without programs, single files, LoRAs, textual inversions, PNG metadata."""
