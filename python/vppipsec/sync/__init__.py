"""Between the two: translate, plan (both pure) and the engine that runs them."""
