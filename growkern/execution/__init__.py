"""EXECUTE: a plan and source tensors to staged target tensors; no module is known here."""
