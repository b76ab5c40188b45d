"""Presets: YAML files, which `firm.config.loading` reads."""
