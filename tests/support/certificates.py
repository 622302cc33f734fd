"""Certificates for a test, made by the openssl command: authorities, and what they sign."""
import os
import subprocess

NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


class Authority:
    """A CA in a folder: <name>.pem and .key there, and those of everybody it signs."""

    def __init__(self, folder, name="ca"):
        self.folder, self.name = folder, name
        self._openssl("req", "-x509", *NEW_KEY, "-days", "2", "-subj", f"/CN=test {name}", "-keyout", name + ".key", "-out",
                      name + ".pem")

    def _openssl(self, *words):
        subprocess.run(["openssl", *words], check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def sign(self, name, *alternatives, common=None):
        """<name>.pem and .key, with these alternative names, such as "DNS:balancekvd" or "IP:10.0.0.1"."""
        with open(os.path.join(self.folder, name + ".ext"), "w", encoding="ascii") as file:
            file.write("extendedKeyUsage=serverAuth,clientAuth\n")
            if alternatives:
                file.write(f"subjectAltName={','.join(alternatives)}\n")
        self._openssl("req", *NEW_KEY, "-subj", f"/CN={common or name}", "-keyout", name + ".key", "-out", name + ".csr")
        self._openssl("x509", "-req", "-days", "2", "-in", name + ".csr", "-CA", self.name + ".pem", "-CAkey",
                      self.name + ".key", "-CAcreateserial", "-extfile", name + ".ext", "-out", name + ".pem")

    def path(self, name):
        return os.path.join(self.folder, name)

    def read(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()
