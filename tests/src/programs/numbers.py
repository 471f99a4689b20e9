# Native libraries of several wheels, each with a result that is the same everywhere.
import hashlib
import io

import numpy
import pandas
import scipy.fft
import scipy.linalg
import scipy.sparse.linalg
import sklearn.cluster
import sklearn.ensemble

generator = numpy.random.default_rng(7)
matrix = generator.normal(size=(60, 60))
print("versions:", numpy.__version__, pandas.__version__, scipy.__version__, sklearn.__version__)
print("inverse:", numpy.abs(numpy.linalg.inv(matrix) @ matrix - numpy.eye(60)).max() < 1e-9)
print("eigenvalues:", numpy.sort(scipy.linalg.eigvals(matrix).real)[:3].round(6))
print("fourier:", numpy.abs(scipy.fft.fft(matrix[0]))[:3].round(6))
print("sparse:", scipy.sparse.linalg.spsolve(scipy.sparse.eye(5, format="csc") * 4, numpy.ones(5)))
frame = pandas.DataFrame({"group": generator.integers(0, 3, 1000), "value": generator.normal(size=1000)})
print("groups:", frame.groupby("group").value.mean().round(6).tolist())
text = frame.to_csv(index=False)
print("table:", hashlib.sha256(text.encode()).hexdigest()[:16], pandas.read_csv(io.StringIO(text)).shape)
forest = sklearn.ensemble.RandomForestClassifier(n_estimators=5, random_state=1).fit(matrix, matrix[:, 0] > 0)
print("forest:", forest.predict(matrix).sum())
print("clusters:", sorted(numpy.bincount(sklearn.cluster.KMeans(3, n_init=1, random_state=1).fit(matrix).labels_)))
libraries = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
print("libraries:", len(libraries), hashlib.sha256(repr(sorted(libraries)).encode()).hexdigest()[:16])
digest = hashlib.sha256()
for library in sorted(libraries):
    with open(library, "rb") as file:
        digest.update(file.read())
print("their bytes:", digest.hexdigest()[:16])
