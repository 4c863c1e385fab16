"""Low-rank adapters in the files of other programs: loralib, kohya and LyCORIS, diffusers, peft."""
