#!/usr/bin/env python3
"""Test vectors of the blob format, from an implementation of docs/format.md that shares nothing with the C one:
AES and GCM are written out here (FIPS 197, SP 800-38D), the rest is Python's own hashlib and hmac.

  seal.py           compare seal.json with what this implementation computes; exit status 1 if they differ
  seal.py --write   write seal.json
"""
import base64
import hashlib
import hmac
import json
import os
import struct
import sys

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'seal.json')


def make_sbox():
    sbox, p, q = [0] * 256, 1, 1
    while True:
        p ^= (p << 1) ^ (0x11B if p & 0x80 else 0)
        p &= 0xFF
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        if q & 0x80:
            q ^= 0x09
        rotated = [(q << n | q >> (8 - n)) & 0xFF for n in range(5)]
        sbox[p] = rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4] ^ 0x63
        if p == 1:
            break
    sbox[0] = 0x63
    return sbox


SBOX = make_sbox()


def double(x):
    return (x << 1 ^ (0x11B if x & 0x80 else 0)) & 0xFF


class Aes256:
    def __init__(self, key):
        words = [list(key[i:i + 4]) for i in range(0, 32, 4)]
        constant = 1
        for i in range(8, 60):
            t = list(words[i - 1])
            if i % 8 == 0:
                t = [SBOX[b] for b in t[1:] + t[:1]]
                t[0] ^= constant
                constant = double(constant)
            elif i % 8 == 4:
                t = [SBOX[b] for b in t]
            words.append([a ^ b for a, b in zip(words[i - 8], t)])
        self.rounds = [sum(words[4 * i:4 * i + 4], []) for i in range(15)]

    def block(self, data):
        s = [a ^ b for a, b in zip(data, self.rounds[0])]
        for n in range(1, 15):
            s = [SBOX[s[(i + 4 * (i % 4)) % 16]] for i in range(16)]
            if n < 14:
                mixed = []
                for c in range(0, 16, 4):
                    a = s[c:c + 4]
                    every = a[0] ^ a[1] ^ a[2] ^ a[3]
                    mixed += [a[i] ^ every ^ double(a[i] ^ a[(i + 1) % 4]) for i in range(4)]
                s = mixed
            s = [a ^ b for a, b in zip(s, self.rounds[n])]
        return bytes(s)


def gcm(key, nonce, text, associated):
    aes = Aes256(key)
    h = int.from_bytes(aes.block(bytes(16)), 'big')

    def multiply(x):
        z, v = 0, h
        for i in range(127, -1, -1):
            if x >> i & 1:
                z ^= v
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
        return z

    out = b''
    for i in range(0, len(text), 16):
        stream = aes.block(nonce + struct.pack('>I', 2 + i // 16))
        out += bytes(a ^ b for a, b in zip(text[i:i + 16], stream))
    y = 0
    for part in (associated, out):
        part += bytes(-len(part) % 16)
        for i in range(0, len(part), 16):
            y = multiply(y ^ int.from_bytes(part[i:i + 16], 'big'))
    y = multiply(y ^ (len(associated) * 8 << 64 | len(text) * 8))
    tag = y ^ int.from_bytes(aes.block(nonce + b'\0\0\0\1'), 'big')
    return out + tag.to_bytes(16, 'big')


def xaes(key, nonce, text, associated):
    aes = Aes256(key)
    l = int.from_bytes(aes.block(bytes(16)), 'big')
    k1 = (l << 1 & (1 << 128) - 1) ^ (0x87 if l >> 127 else 0)

    def half(n):
        m = int.from_bytes(bytes([0, n]) + b'X\0' + nonce[:12], 'big')
        return aes.block((m ^ k1).to_bytes(16, 'big'))

    return gcm(half(1) + half(2), nonce[12:], text, associated)


def hkdf(key, info):
    extracted = hmac.new(bytes(32), key, hashlib.sha256).digest()
    return hmac.new(extracted, info + b'\1', hashlib.sha256).digest()


def id_text(value):
    return base64.urlsafe_b64encode(value).rstrip(b'=').decode()


def name_hash(master, directory, name):
    key = hkdf(master, b'sessionfs names 1')
    return hmac.new(key, directory + name, hashlib.sha256).digest()[:16]


def encode_meta(m):
    name, xattrs = bytes.fromhex(m['name']), bytes.fromhex(m['xattrs'])
    return struct.pack('<BBHIIIQQqqq16sHHI', 1, m['policy'], 80, m['mode'], m['uid'], m['gid'], int(m['ino']),
                       int(m['ttl_ms']), int(m['mtime_ns']), int(m['ctime_ns']), int(m['created_ns']),
                       bytes.fromhex(m['dir_id']), len(name), 0, len(xattrs)) + name + xattrs


def seal(v):
    meta, content, nonce = encode_meta(v['meta']), bytes.fromhex(v['content']), bytes.fromhex(v['nonce'])

    def header(state):
        return struct.pack('<4sBBHIIQQQ24s', b'SFSB', 1, state, 64, v['key_id'], len(meta), len(content),
                           int(v['seq']), int(v['unique']), nonce)

    place = v['l2_key'].encode()
    associated = struct.pack('<I', len(place)) + place + header(0)
    key = hkdf(bytes.fromhex(v['master']), b'sessionfs data 1')
    return (header(v['state']) + xaes(key, nonce, meta, associated + b'M') +
            xaes(key, nonce[:23] + bytes([nonce[23] | 1]), content, associated + b'C'))


def build():
    master = bytes(range(32))
    zero, root = bytes(16), bytes(range(0xA0, 0xB0))
    published = [
        {'key': '01' * 32, 'nonce': b'ABCDEFGHIJKLMNOPQRSTUVWX'.hex(), 'plaintext': b'XAES-256-GCM'.hex(),
         'associated': '', 'result': 'ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271'},
        {'key': '03' * 32, 'nonce': b'ABCDEFGHIJKLMNOPQRSTUVWX'.hex(), 'plaintext': b'XAES-256-GCM'.hex(),
         'associated': b'c2sp.org/XAES-256-GCM'.hex(),
         'result': '986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d'},
    ]
    for v in published:  # C2SP's own results: they also prove the AES and GCM above
        got = xaes(*(bytes.fromhex(v[k]) for k in ('key', 'nonce', 'plaintext', 'associated')))
        assert got.hex() == v['result'], v

    names = [(zero, b''), (root, b'sess_0123456789abcdef'), (zero, b'sess_0123456789abcdef'), (root, b'a'),
             (root, 'größe'.encode()), (root, b'n' * 255)]
    ids = [zero, b'\xff' * 16, root, bytes(range(16)), b'\xfb\xf0' * 8]

    def blob(note, key_id, state, l2_name, meta, content):
        v = {'note': note, 'master': master.hex(), 'key_id': key_id, 'state': state, 'seq': '7',
             'unique': str(0x8877665544332211), 'nonce': (bytes(range(0x40, 0x57)) + b'\x58').hex(),
             'l2_key': 'sfs:web:%s:%s' % (id_text(l2_name[0]), id_text(name_hash(master, *l2_name))),
             'meta': meta, 'meta_plaintext': encode_meta(meta).hex(), 'content': content.hex()}
        v['blob'] = seal(v).hex()
        return v

    file_meta = {'mode': 0o100600, 'uid': 33, 'gid': 33, 'policy': 1, 'ino': str(0x0102030405060708),
                 'ttl_ms': '1800000', 'mtime_ns': '1767225600123456789', 'ctime_ns': '1767225600123456789',
                 'created_ns': '-1', 'dir_id': zero.hex(), 'name': b'sess_0123456789abcdef'.hex(),
                 'xattrs': b'user.color\0blue'.hex()}
    root_meta = {'mode': 0o40755, 'uid': 0, 'gid': 0, 'policy': 0, 'ino': '1', 'ttl_ms': str(2**64 - 1),
                 'mtime_ns': '0', 'ctime_ns': '0', 'created_ns': '0', 'dir_id': root.hex(), 'name': '', 'xattrs': ''}
    return {
        'about': 'docs/format.md; made and checked by seal.py. Bytes in hexadecimal, 64-bit numbers in decimal.',
        'xaes': published,
        'xaes_accumulated': {'iterations': 10000,
                             'result': 'e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939'},
        'derivation': [{'master': m.hex(), 'data': hkdf(m, b'sessionfs data 1').hex(),
                        'names': hkdf(m, b'sessionfs names 1').hex()} for m in (master, b'\xff' * 32)],
        'names': [{'master': master.hex(), 'directory': d.hex(), 'name': n.hex(),
                   'hash': name_hash(master, d, n).hex(), 'text': id_text(name_hash(master, d, n))}
                  for d, n in names],
        'ids': [{'id': i.hex(), 'text': id_text(i)} for i in ids],
        'blobs': [
            blob('a session', 1, 0, (root, b'sess_0123456789abcdef'), file_meta,
                 b'user_id|i:1000;cart|a:2:{i:0;s:3:"tea";i:1;s:3:"cup";}'),
            blob('the root directory: state open, no content', 1, 0xA5, (zero, b''), root_meta, b''),
        ],
    }


def main():
    text = json.dumps(build(), indent=1) + '\n'
    if sys.argv[1:] == ['--write']:
        with open(PATH, 'w') as f:
            f.write(text)
        return 0
    with open(PATH) as f:
        if f.read() == text:
            print('seal.json: every vector agrees')
            return 0
    print('seal.json: differs from what docs/format.md gives', file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
