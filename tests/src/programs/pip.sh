# pip with a wheel and a source archive.
set -eu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1 HOME=/root

mkdir -p /wheels /source/hermes_source
cd /wheels
python3 - <<'PYTHON'
import base64, hashlib, zipfile

files = {
    "hermes_wheel/__init__.py": "def main():\n    print('the wheel runs')\n",
    "hermes_wheel-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: hermes-wheel\nVersion: 1.0\n",
    "hermes_wheel-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: case\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "hermes_wheel-1.0.dist-info/entry_points.txt": "[console_scripts]\nhermes-wheel = hermes_wheel:main\n",
}
record = ""
for name, text in files.items():
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    record += f"{name},sha256={digest},{len(text)}\n"
files["hermes_wheel-1.0.dist-info/RECORD"] = record + "hermes_wheel-1.0.dist-info/RECORD,,\n"
with zipfile.ZipFile("hermes_wheel-1.0-py3-none-any.whl", "w") as wheel:
    for name, text in files.items():
        wheel.writestr(name, text)
PYTHON
printf 'from setuptools import setup\nsetup(name="hermes-source", version="2.0", packages=["hermes_source"])\n' >/source/setup.py
echo 'VALUE = 42' >/source/hermes_source/__init__.py
tar -C / --transform 's/^source/hermes-source-2.0/' -czf /wheels/hermes-source-2.0.tar.gz source
install() { pip install --quiet --no-index --no-build-isolation --no-cache-dir --break-system-packages --find-links /wheels "$@"; }
fact 'pip install of a wheel' install hermes-wheel
fact 'it runs' hermes-wheel
fact 'pip install of a source archive' install hermes-source
fact 'it is imported' python3 -c 'import hermes_source; print(hermes_source.VALUE, hermes_source.__file__)'
fact 'what pip installed' sh -c 'pip show --files hermes-wheel hermes-source | grep -v ^Location'
fact 'what pip has in all' sh -c 'pip list --format freeze | sort | cksum'
fact 'pip uninstall' sh -c 'pip uninstall --quiet --yes --break-system-packages hermes-wheel hermes-source; pip list --format freeze | grep -c hermes'
