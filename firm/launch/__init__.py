"""Launch: where a training job runs. A stage builds a :class:`firm.launch.job.TrainingJob`; a launcher runs it."""
