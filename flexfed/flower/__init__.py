"""The room that speaks Flower: jobs and updates as messages, and grids."""
