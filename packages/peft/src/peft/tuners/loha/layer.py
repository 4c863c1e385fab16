"""The class of wrapped layers there; no layer is wrapped here."""

from ...unserved import unserved_class

LoHaLayer = unserved_class("LoHaLayer")
