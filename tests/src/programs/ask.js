// Asks the service in this container until it answers, and says what its process has mapped.
const fs = require('fs');
const deadline = Date.now() + 100000;

async function ask() {
  try {
    const answer = await fetch('http://127.0.0.1:8080/');
    // The service shuffles its words and tells the time.
    const words = (await answer.text()).replace(/<[^>]*>| at [^,]*/g, ' ').split(/[\s,]+/).filter(Boolean).sort();
    const lines = fs.readFileSync('/proc/1/maps', 'utf8').split('\n').filter((line) => line.includes('/'));
    const files = [...new Set(lines.map((line) => line.slice(line.indexOf('/'))))].sort();
    console.log(`status: ${answer.status}`);
    console.log(`answer: ${words.join(' ')}`);
    console.log(`mapped files: ${files.join(' ')}`);
    console.log(`program: ${fs.readFileSync('/proc/1/exe').length}`);
  } catch (error) {
    if (Date.now() > deadline) throw error;
    setTimeout(ask, 20);
  }
}
ask();
