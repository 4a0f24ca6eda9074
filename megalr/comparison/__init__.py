"""The comparison of methods: every method of a recipe trains the same model on the same text."""
