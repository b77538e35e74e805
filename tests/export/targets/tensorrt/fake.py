"""A stand-in for TensorRT's Python module, as far as the child process that builds an engine calls it."""

# The code that a test puts after it decides what the build does.
FAKE = """
import enum, os, sys, time

__version__ = "0.0"
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
BuilderFlag = enum.Enum("BuilderFlag", ["SPARSE_WEIGHTS"])
ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["DETAILED"])
Severity = enum.Enum("Severity", ["ERROR", "INFO"])


class ILogger:
    pass


class Network:
    num_inputs, num_layers = 0, 3


class Config:
    def set_flag(self, flag):
        LOG.log(Severity.INFO, f"flag {flag.name}")

    def add_optimization_profile(self, profile):
        pass

    def create_timing_cache(self, data):
        return None if data == b"damaged" else Cache()

    def set_timing_cache(self, cache, ignore_mismatch):
        return not ignore_mismatch


class Cache:
    def serialize(self):
        return b"times"


class OnnxParser:
    num_errors = 0

    def __init__(self, network, logger):
        pass

    def parse_from_file(self, path):
        return True


class Builder:
    def __init__(self, logger):
        global LOG
        LOG = logger

    def create_network(self, flags):
        assert flags == 1 << 1
        return Network()

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return object()

    def build_serialized_network(self, network, config):
        LOG.log(Severity.INFO, "building")
        return build()
"""
