"""Critics: rubrics, answers and the back ends that judge, in this process or behind an endpoint."""
