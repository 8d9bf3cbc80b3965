"""Tests in several processes. A package, so that its modules' names are not taken elsewhere."""
