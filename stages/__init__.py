"""Harvest, fit, inspect: what runs a model or trains an SAE. Imports storage, never pipeline."""
