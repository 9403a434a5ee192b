"""EXECUTE: compute staged target tensors from a plan and source tensors, without access to modules."""
