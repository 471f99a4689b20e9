#!/bin/sh
# Starts the class that the image's command names, as Spark's own images do.
exec /opt/spark/bin/spark-class "$@"
