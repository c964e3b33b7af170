"""Helpers of the tests and the tools: servers, proxies, processes, and an independent reader of the formats."""
