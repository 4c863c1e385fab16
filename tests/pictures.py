"""Tiny PNGs of two colours, and a small image classifier to train on them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import models

CHANNELS = {"red": 0, "blue": 2}


def paint(file: Path, color: str, seed: int, size: tuple[int, int] = (12, 10)) -> None:
    """Writes an image (width, height) that is mostly of one colour."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 80, (height, width, 3), dtype=np.uint8)
    pixels[..., CHANNELS[color]] += 150
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def paint_folders(folder: Path, each: int = 12) -> Path:
    """`folder/red/0.png`, `folder/blue/0.png` …"""
    for color in CHANNELS:
        for number in range(each):
            paint(folder / color / f"{number}.png", color, number)
    return folder


def save_seeing_base(folder: Path) -> Path:
    """A small random image classifier of three classes, saved with its image processor."""
    torch.manual_seed(0)
    models.vit().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder
