"""Chromium without a window, driven by the standard library through a pair of pipes.

    with Browser(folder) as page:
        page.open(file)
        page.js('document.title')

See https://chromedevtools.github.io/devtools-protocol, and `--remote-debugging-pipe`: messages are JSON,
each ends with a zero, Chromium reads them from file 3 and writes them to file 4."""
import json, os, select, shutil, subprocess, sys, time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
OPTIONS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
           '--remote-debugging-pipe', 'about:blank']
START = '''
import fcntl, os, sys
ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]
for end, n in zip(ends, (3, 4)): os.dup2(end, n)
os.execv(sys.argv[3], sys.argv[3:])
'''

class Browser:
    def __init__(self, folder):
        theirs, self.out = os.pipe()
        self.into, back = os.pipe()
        words = [sys.executable, '-c', START, str(theirs), str(back), CHROMIUM, f'--user-data-dir={folder}']
        self.process = subprocess.Popen(
            [*words, *OPTIONS], pass_fds=(theirs, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | dict(HOME=str(folder)))
        for end in (theirs, back): os.close(end)
        self.number, self.rest, self.session = 0, b'', None
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        self.call('Page.enable')

    def __enter__(self): return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(20)
        for end in (self.out, self.into): os.close(end)

    def receive(self):
        while b'\0' not in self.rest:
            assert select.select([self.into], [], [], 60)[0], 'Chromium says nothing'
            more = os.read(self.into, 2**20)
            assert more, 'Chromium has ended'
            self.rest += more
        message, _, self.rest = self.rest.partition(b'\0')
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        message = dict(id=self.number, method=method, params=params) | (
            {'sessionId': self.session} if self.session else {})
        os.write(self.out, json.dumps(message).encode() + b'\0')
        while (answer := self.receive()).get('id') != self.number: pass
        if 'navigated' in answer.get('error', {}).get('message', ''): return {'result': {}}   # the page left
        assert 'error' not in answer, answer
        return answer['result']

    def js(self, code):
        found = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in found, found['exceptionDetails']
        return found['result'].get('value')

    def open(self, file):
        self.call('Page.navigate', url=Path(file).resolve().as_uri())
        self.until("document.readyState == 'complete' && location.protocol == 'file:'")

    def until(self, code, seconds=30):
        end = time.time() + seconds
        while not self.js(code):
            assert time.time() < end, code
            time.sleep(.05)

    def middle(self, selector):
        found = f'document.querySelector({selector!r})'
        self.js(f'{found}.scrollIntoView({{block: "center"}})')
        middle = '(b => [b.x + b.width/2, b.y + b.height/2])'
        return self.js(f'{middle}({found}.getBoundingClientRect())')

    def mouse(self, kind, at, **more):
        self.call('Input.dispatchMouseEvent', type=kind, x=at[0], y=at[1], **more)

    def click(self, selector):
        at = self.middle(selector)
        for kind in ('mousePressed', 'mouseReleased'): self.mouse(kind, at, button='left', clickCount=1)

    def write(self, selector, text):
        self.click(selector)
        self.js(f'document.querySelector({selector!r}).select()')
        self.call('Input.insertText', text=text)

    def key(self, name):
        for kind in ('keyDown', 'keyUp'): self.call('Input.dispatchKeyEvent', type=kind, key=name, code=name)
