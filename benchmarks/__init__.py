"""Measurements: schemes and peers on a cluster emulated with Linux network namespaces. Not part of the package."""
