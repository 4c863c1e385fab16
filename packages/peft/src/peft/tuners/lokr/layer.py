"""The class of wrapped layers there; no layer is wrapped here."""

from ...unserved import unserved_class, unserved_function

LoKrLayer = unserved_class("LoKrLayer")
factorization = unserved_function("factorization")
