"""The class of wrapped layers there; no layer is wrapped here."""

from ...unserved import unserved_class

LoraLayer = unserved_class("LoraLayer")
Linear = unserved_class("LoraLinearLayer", LoraLayer)
Conv2d = unserved_class("LoraConv2dLayer", LoraLayer)
Embedding = unserved_class("LoraEmbeddingLayer", LoraLayer)
